"""What the watchdog reads of threads that run on meanwhile; hangs themselves are in tests/end_to_end/test_hang.py."""

import json
import sys
from types import SimpleNamespace

from megatron_tn.training import watchdog
from megatron_tn.training.watchdog import Progress, Watchdog, where_is


def test_a_frame_between_two_lines_stands_at_its_function():
    """As Python 3.11 shows a running thread's now and then."""
    code = sys._getframe().f_code
    waiting, place = where_is(SimpleNamespace(f_code=code, f_lineno=None, f_back=None))
    assert not waiting
    assert place.endswith(f"test_watchdog.py:{code.co_firstlineno} in {code.co_name}: def {code.co_name}():")


def test_a_sign_of_life_is_given_wherever_the_rank_is(tmp_path, monkeypatch):
    monkeypatch.setattr(watchdog.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(watchdog.dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(watchdog, "where_is", lambda frame: 1 // 0)
    with Watchdog(tmp_path, Progress(), timeout_s=60, long_s=60) as watching:
        sign = json.loads((watching.folder / "00000.json").read_text())
    assert sign["count"] == 1
    assert sign["place"].startswith("a place that could not be read: ZeroDivisionError(")
