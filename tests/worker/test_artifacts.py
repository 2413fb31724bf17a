"""Pictures stay in their folder, whatever stands in Redis."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from worker.artifacts import ArtifactStore
from worker.training import TrainJob

JOB = "0123456789abcdef" * 2


def test_a_picture_is_kept_and_deleted(tmp_path: Path) -> None:
    store = ArtifactStore(str(tmp_path / "pictures"))
    store.write(JOB, 0, b"png")
    assert store.read(JOB, 0) == b"png"
    store.delete(JOB)
    store.delete(JOB)
    with pytest.raises(FileNotFoundError):
        store.read(JOB, 0)


@pytest.mark.parametrize("job_id", ["..", "../other", "/etc", "", "a/b", "a\0", "A", "." * 3, "a" * 65, "x\n"])
def test_ids_that_lead_elsewhere_reach_no_file(tmp_path: Path, job_id: str) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "0.png").write_bytes(b"precious")
    store = ArtifactStore(str(tmp_path / "pictures"))
    with pytest.raises(FileNotFoundError):
        store.write(job_id, 0, b"png")
    with pytest.raises(FileNotFoundError):
        store.read(job_id, 0)
    store.delete(job_id)
    assert (other / "0.png").read_bytes() == b"precious"
    assert list(tmp_path.iterdir()) == [other]


@pytest.mark.parametrize("job_id", ["train-../../x", "train-" + "0" * 31, "0" * 32, "train-" + "0" * 32 + "/.."])
def test_a_training_job_of_such_an_id_is_none(job_id: str) -> None:
    fields = {"created": 0.0, "what": "diffusion", "config": {"steps": 1}, "init": None, "publish": None}
    with pytest.raises(ValidationError, match="id"):
        TrainJob.model_validate({**fields, "id": job_id, "publish_every": None, "publish_defaults": None})
