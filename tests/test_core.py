"""The public face of the core: every name is there, and none costs anything until it is used."""

from __future__ import annotations

import subprocess
import sys

import pytest

import instructmining_core


@pytest.mark.parametrize("name", instructmining_core.__all__)
def test_every_public_name_is_found_in_its_room(name):
    found = getattr(instructmining_core, name)
    assert name in dir(instructmining_core)
    assert getattr(found, "__name__", name) == name
    assert getattr(found, "__module__", "instructmining_core.").startswith("instructmining_core.")


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'nothing'"):
        _ = instructmining_core.nothing


def test_importing_the_core_and_its_settings_is_light():
    code = (
        "import sys, instructmining_core as core; assert len(core.__all__) == 16;"
        "core.ModelRef, core.INDICATORS;"
        "print([m for m in ('torch', 'transformers', 'pandas', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
