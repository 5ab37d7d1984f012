from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.scripts.tpu_vm import Cloud


@pytest.fixture
def cloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    made = Cloud(tmp_path)
    yield made
    monkeypatch.setenv("STUB", os.fspath(made.stub))
    from tests.scripts import stub_gcloud

    monkeypatch.setattr(stub_gcloud, "STUB", made.stub)
    stub_gcloud.end_all()
