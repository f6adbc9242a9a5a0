"""Where bars are shown."""

import sys

from diffusers_graft.core.progress import hide_bar


def test_bars_are_shown_on_terminals_and_in_notebooks_with_widgets(monkeypatch):
    monkeypatch.delitem(sys.modules, "ipykernel.zmqshell", raising=False)
    assert hide_bar(True) is None  # tqdm asks the terminal
    assert hide_bar(False) is True
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "ipykernel.zmqshell", sys)
    assert hide_bar(True) is None  # lines of text
    monkeypatch.setattr("importlib.util.find_spec", lambda name: sys)
    assert hide_bar(True) is False
    assert hide_bar(False) is True
