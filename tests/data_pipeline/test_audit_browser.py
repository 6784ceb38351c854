"""The audit page in a real headless browser."""

import functools
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from data_pipeline.audit.answers import AnswersFile
from data_pipeline.audit.app import Audit
from data_pipeline.audit.samples import Samples
from data_pipeline.audit.server import AuditServer
from tests.data_pipeline.audit_factory import HOSTILE, make_samples, start
from tests.helpers.browser import chromium

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")


@pytest.fixture(scope="module")
def driver(tmp_path_factory) -> Iterator["webdriver.Chrome"]:
    with chromium(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., AuditServer]]:
    servers = []

    def make(texts: list[str] | None = None, *, show_verdict: bool = False, token: str | None = None) -> AuditServer:
        samples = Samples.load(make_samples(tmp_path / "samples.jsonl", texts))
        audit = Audit(samples, AnswersFile(tmp_path / "answers.jsonl"), "ann", show_verdict=show_verdict)
        servers.append(server := AuditServer(audit, "127.0.0.1", 0, token))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return server

    yield make
    for server in servers:
        server.shutdown()
        server.server_close()


def until(condition: Callable[[], object], seconds: float = 8.0) -> object:
    """What `condition` gives once it is true; a page that changes under the look counts as not yet."""
    from selenium.common.exceptions import WebDriverException

    end = time.monotonic() + seconds
    while True:
        try:
            if found := condition():
                return found
        except WebDriverException:
            pass
        assert time.monotonic() < end, "the page did not get there"
        time.sleep(0.02)


def text(driver, name: str) -> str:
    """The text of an element by its id, as it is in the page."""
    return driver.execute_script("return document.getElementById(arguments[0]).textContent", name)


def hidden(driver, name: str) -> bool:
    return driver.execute_script("return document.getElementById(arguments[0]).hidden", name)


def at(driver, number: int) -> bool:
    """Whether document `number`, from 1, is shown and takes keys."""
    return not hidden(driver, "document") and text(driver, "about").startswith(f"document {number} ")


def press(driver, keys: str) -> None:
    webdriver.ActionChains(driver).send_keys(keys).perform()


def open_page(driver, url: str) -> None:
    driver.get(url)
    until(lambda: text(driver, "place"))
    until(lambda: text(driver, "about") or not hidden(driver, "done"))


def verdicts(server: AuditServer) -> list[str]:
    """In the order of the samples, of those that are answered."""
    given = {answer.sample: answer.verdict for answer in AnswersFile(server.audit.answers.path).all()}
    return [given[sample.id] for sample in server.audit.samples.entries if sample.id in given]


def scroll_to_the_end(driver, characters: int) -> None:
    """To the end of a long text, which comes in pieces as one scrolls, no frame taking long."""
    end = time.monotonic() + 30
    while not hidden(driver, "rest"):
        began = time.monotonic()
        assert began < end, "the text does not come to its end"
        driver.execute_script("scrollTo(0, document.body.scrollHeight)")
        driver.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
        assert time.monotonic() - began < 5, "the page froze"
    assert driver.execute_script("return document.getElementById('text').textContent.length") >= characters


LEFT, RIGHT, ESCAPE = "\ue012", "\ue014", "\ue00c"


def test_judging_by_keyboard_through_undo_and_reload(driver, serve):
    server = serve()
    open_page(driver, server.url)
    assert "hidden until you answer" in text(driver, "filter")
    for number, key in enumerate("kd3", 1):
        until(lambda number=number: at(driver, number))
        press(driver, key)
    until(lambda: at(driver, 4))
    assert text(driver, "place") == "3 of 6 judged"
    assert verdicts(server) == ["keep", "drop", "unsure"]
    press(driver, "z")
    until(lambda: at(driver, 3))
    assert "The filter keeps it" in text(driver, "filter")
    press(driver, "d")
    until(lambda: at(driver, 4))
    assert verdicts(server) == ["keep", "drop", "drop"]
    press(driver, LEFT)
    until(lambda: at(driver, 3))
    press(driver, RIGHT)
    until(lambda: at(driver, 4))
    press(driver, "n")
    press(driver, "kept: d" + ESCAPE)  # letters in the note are no verdicts
    assert at(driver, 4)
    press(driver, "k")
    until(lambda: at(driver, 5))
    driver.refresh()
    until(lambda: at(driver, 5))
    for number in (5, 6):
        until(lambda number=number: at(driver, number))
        press(driver, "1")
    until(lambda: not hidden(driver, "done"))
    assert text(driver, "place") == "6 of 6 judged"
    assert "agreement" in text(driver, "figures")
    lines = [json.loads(line) for line in server.audit.answers.path.read_text().splitlines()]
    assert [line["verdict"] for line in lines] == ["keep", "drop", "unsure", "drop", "keep", "keep", "keep"]
    assert [line["blind"] for line in lines] == [True, True, True, False, True, True, True]
    assert lines[4]["note"] == "kept: d"


def test_scores_shown_before_the_answer_make_it_not_blind(driver, serve):
    server = serve()
    open_page(driver, server.url)
    press(driver, "s")
    until(lambda: "The filter drops it" in text(driver, "filter"))
    assert "1.000 nats per token" in text(driver, "filter")
    assert "low tail" in text(driver, "filter")
    press(driver, "d")
    until(lambda: at(driver, 2))
    assert [answer.blind for answer in AnswersFile(server.audit.answers.path).all()] == [False]


def test_hostile_documents_are_text_and_execute_nothing(driver, serve):
    server = serve([HOSTILE, "x" * 1_000_000, "a\0" * 60_000, ""], show_verdict=True)
    driver.get_log("browser")
    open_page(driver, server.url)
    shown = text(driver, "text")
    assert "<script>document.title='owned'</script>" in shown
    assert "<img src=x onerror=" in shown
    assert driver.title == "Audit: samples.jsonl"
    assert driver.execute_script("return document.querySelectorAll('#text img, #text script').length") == 0
    marks = driver.execute_script("return [...document.querySelectorAll('#text .mark')].map(m => m.textContent)")
    assert marks == ["RLO", "LRI", "PDI", "PDF", "NUL\u00d73", "ESC", "U+D800", "BOM"]
    assert not set("\u202e\x00\x1b") & set(shown)
    press(driver, RIGHT)
    until(lambda: at(driver, 2))
    scroll_to_the_end(driver, 1_000_000)
    press(driver, RIGHT)
    until(lambda: at(driver, 3))
    assert len(text(driver, "text")) < 200_000
    scroll_to_the_end(driver, 240_000)
    press(driver, RIGHT)
    until(lambda: at(driver, 4))
    assert text(driver, "end") == "The document is empty"
    assert [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_every_acknowledged_answer_survives_kill_9_and_the_page_goes_on(driver, tmp_path):
    samples = make_samples(tmp_path / "s.jsonl")
    process, url = start(f"samples={samples}", "port=0", "auditor=ann")
    try:
        open_page(driver, url)
        for number in (1, 2):
            until(lambda number=number: at(driver, number))
            press(driver, "k")
        until(lambda: at(driver, 3))
        process.send_signal(signal.SIGKILL)
        process.wait()
        answers = tmp_path / "s.answers.jsonl"
        assert [answer.verdict for answer in AnswersFile(answers).all()] == ["keep", "keep"]
        with answers.open("ab") as file:
            file.write(b'{"sample": "torn')
        press(driver, "d")
        until(lambda: "server does not answer" in text(driver, "alert"))
        assert at(driver, 3)
        again = urlsplit(url)
        words = (f"port={again.port}", f"token={parse_qs(again.query)['token'][0]}")
        process, _ = start(f"samples={samples}", *words, "auditor=ann")
        press(driver, "d")  # the open page goes on with the new server
        until(lambda: at(driver, 4))
        assert hidden(driver, "alert")
        assert "damaged line" in text(driver, "problems")
        driver.refresh()
        until(lambda: at(driver, 4))
        assert [answer.verdict for answer in AnswersFile(answers).all()] == ["keep", "keep", "drop"]
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[str]:
    """A page of another origin on this machine, which a browser lets talk to loopback."""
    (folder := tmp_path / "elsewhere").mkdir()
    (folder / "index.html").write_text("<title>elsewhere</title>")

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format, *values):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/"
    server.shutdown()
    server.server_close()


def test_a_page_of_another_origin_can_neither_read_nor_answer(driver, serve, elsewhere):
    server = serve()
    sample = server.audit.samples.entries[0].id
    port = server.server_address[1]
    asked, knows = [], server.knows
    server.knows = lambda host: asked.append(host) or knows(host)
    attempt = """
      const [target, body, token, done] = arguments;
      const headers = {"Content-Type": "application/json", "X-Audit-Token": token};
      Promise.allSettled([
        fetch(target + "api/session"),
        fetch(target + "api/answers", {method: "POST", body, headers}),
        fetch(target + "api/answers", {method: "POST", body, mode: "no-cors"}),
      ]).then(found => done(found.map(one => one.status === "rejected" ? "refused" : one.value.type)));
    """
    body = json.dumps({"sample": sample, "verdict": "drop"})
    driver.get(elsewhere)
    outcome = driver.execute_async_script(attempt, f"http://127.0.0.1:{port}/", body, server.audit.token)
    assert outcome == ["refused"] * 3
    assert len(asked) == 2  # the POST with headers of its own never leaves the browser: its preflight is refused
    assert not server.audit.answers.path.exists()


def test_two_tabs_lose_no_answer(driver, serve):
    server = serve()
    open_page(driver, server.url)
    first = driver.current_window_handle
    driver.switch_to.new_window("tab")
    open_page(driver, server.url)
    press(driver, "k")
    until(lambda: at(driver, 2))
    driver.close()
    driver.switch_to.window(first)
    press(driver, "d")  # the same document, judged again
    until(lambda: at(driver, 2))
    lines = [json.loads(line) for line in server.audit.answers.path.read_text().splitlines()]
    assert [line["verdict"] for line in lines] == ["keep", "drop"]
    assert verdicts(server) == ["drop"]


def test_a_narrow_screen_shows_everything_without_sideways_scrolling(driver, serve):
    server = serve([HOSTILE, "y" * 3000], show_verdict=True)
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 360, "height": 640, "deviceScaleFactor": 1, "mobile": True}
    )
    try:
        open_page(driver, server.url)
        assert driver.execute_script("return document.documentElement.scrollWidth") <= 360
        for name in ("keep", "drop", "unsure"):
            button = driver.find_element("css selector", f"button[data-verdict={name}]")
            box = button.rect
            assert box["width"] >= 60
            assert box["height"] >= 40
            assert 0 <= box["x"] <= 360 - box["width"]
        driver.find_element("css selector", "button[data-verdict=drop]").click()
        until(lambda: at(driver, 2))
        driver.get(server.url + "summary")
        until(lambda: "precision" in text(driver, "content"))
        assert driver.execute_script("return document.documentElement.scrollWidth") <= 360
    finally:
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_the_summary_names_disagreements_and_leads_to_them(driver, serve):
    server = serve(token="a-secret-token")
    open_page(driver, server.url)
    press(driver, "k")  # of score 1.0: the filter drops it
    until(lambda: at(driver, 2))
    driver.find_element("id", "to-summary").click()
    until(lambda: "against the filter: 1" in text(driver, "content"))
    driver.find_element("css selector", "td a").click()
    until(lambda: at(driver, 1))
    assert driver.execute_script("return document.querySelector('[aria-pressed=true]').dataset.verdict") == "keep"
