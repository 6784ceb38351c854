"""Free memory: of the machine, and of a container with a limit."""

from megatron_tn.device import free_memory
from megatron_tn.device.free_memory import free_bytes


def test_the_page_cache_of_a_container_is_free(tmp_path, monkeypatch):
    """Reading files fills a container's memory with pages that the kernel gives up again."""
    monkeypatch.setattr(free_memory, "CGROUP", tmp_path)
    of_the_machine = free_bytes()
    assert of_the_machine > 1000
    stat = "anon 300\nfile 690\nshmem 10\ninactive_anon 10\nactive_file 400\ninactive_file 280\n"
    for name, text in (("max", "1000\n"), ("current", "995\n"), ("stat", stat)):
        (tmp_path / f"memory.{name}").write_text(text)
    assert free_bytes() == 1000 - (995 - 680)
    (tmp_path / "memory.max").write_text("max\n")
    assert free_bytes() > 1000
