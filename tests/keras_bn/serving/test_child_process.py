"""A child imports what its parent imported, and nothing of the folder."""

import json
import os
import sys

import numpy as np
import pytest

from keras_bn.serving import child_process
from keras_bn.serving.errors import ExportError

_PROGRAM = """
import importlib, json, sys

request = json.load(sys.stdin)
found = {x: importlib.import_module(x).__file__ for x in request["names"]}
with open(request["found"], "w") as file:
    json.dump(found, file)
"""


def test_the_current_folder(tmp_path, monkeypatch):
    hostile, library = tmp_path / "hostile", tmp_path / "library"
    ran = tmp_path / "ran"
    for folder in (hostile, library):
        folder.mkdir()
    (library / "own_layers.py").write_text("")
    (library / "later.py").write_text("")
    (tmp_path / "program.py").write_text(_PROGRAM)
    monkeypatch.syspath_prepend(library)
    import own_layers

    names = ["json", "runpy", "sitecustomize", "usercustomize"]
    names += ["h5py", "later", "numpy", "own_layers"]
    for name in names:
        (hostile / f"{name}.py").write_text(
            f"open({str(ran)!r}, 'a').write({name!r})\n"
        )
    (hostile / "here.py").write_text("")
    monkeypatch.chdir(hostile)
    # As in an interactive session. What is in other folders comes first.
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    paths = ["", ".", os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    # Found by the finder alone.
    (library / "own_layers.py").rename(tmp_path / "own_layers.py")
    own_layers.__spec__.origin = str(tmp_path / "own_layers.py")
    child_process.run(
        "Testing",
        tmp_path / "program.py",
        {
            "names": ["h5py", "here", "json", "later", "numpy", "own_layers"],
            "found": str(tmp_path / "found"),
        },
        {},
        ["numpy", "own_layers"],
    )
    assert not ran.exists(), ran.read_text()
    found = json.loads((tmp_path / "found").read_text())
    assert found["numpy"] == np.__file__
    assert found["later"] == str(library / "later.py")
    assert found["own_layers"] == str(tmp_path / "own_layers.py")
    # Where this process finds nothing else, nor does the child.
    assert found["here"] == str(hostile / "here.py")


def test_a_child_that_fails(tmp_path):
    (tmp_path / "program.py").write_text("raise OSError('no room')")
    with pytest.raises(ExportError) as error:
        child_process.run("Testing", tmp_path / "program.py", {}, {})
    assert str(error.value) == (
        "Testing, a process of its own failed with exit code 1: OSError: no "
        "room. Nothing was published."
    )
