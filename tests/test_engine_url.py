"""`--engine-url`: what is no address of a server is refused at the start, with the fix."""

from __future__ import annotations

from pathlib import Path

import pytest

import app
from assistant.server import check_engine_url


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8000",
        "gpu-box",
        "",
        "ftp://gpu-box:8000",
        "http://",
        "http://:8000",
        "http:///v1",
        "http://gpu-box:eight",
        "http://gpu-box:80000",
        "http://[::1",
        "http://gpu-box:8000?key=1",
    ],
)
def test_an_address_that_is_none_is_refused_before_anything_starts(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["serve", "--data", str(tmp_path / "data"), "--engine-url", "http://gpu-box:8000/v1"]
    assert app.main([*asked, "--engine-url", url]) == 2
    assert f"--engine-url: got {url!r}; give it as http://HOST:PORT" in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("url", ["https://gpu-box", "http://[::1]:8000", "http://ray:8000/replica-0"])
def test_an_address_may_have_a_path_and_needs_no_port(url: str) -> None:
    check_engine_url(url)
