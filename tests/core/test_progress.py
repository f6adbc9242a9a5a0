"""Where bars are shown."""

import sys

from diffusers_graft.core.progress import hide_bar


def test_bars_are_shown_on_terminals_and_in_notebooks(monkeypatch):
    monkeypatch.delitem(sys.modules, "ipykernel.zmqshell", raising=False)
    assert hide_bar(True) is None  # tqdm asks the terminal
    assert hide_bar(False) is True
    monkeypatch.setitem(sys.modules, "ipykernel.zmqshell", sys)
    assert hide_bar(True) is False
    assert hide_bar(False) is True
