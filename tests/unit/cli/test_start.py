"""A first visit."""

from __future__ import annotations


def test_doctor_prints_its_facts_on_stdout(smolora):
    code, out, err = smolora("doctor")
    names = [line[:24].strip() for line in out.splitlines()]
    assert (code, err) == (0, "")
    assert names[:8] == ["smolora", "device", "base dtype", "threads", "allocator", "memory", "disk", "libraries"]
