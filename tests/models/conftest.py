from collections.abc import Callable, Iterator

import huggingface_hub.constants
import pytest

from rlhf_exp.machine.network import reachable, responds
from tests.builders import ARCHITECTURES

PATHS = "/{repo_id}/resolve/{revision}/{filename}"
UseHub = Callable[[str], None]


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def use_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[UseHub]:
    """Has everything ask a hub at an address, whatever proxies there are."""
    for proxy in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)

    def use(address: str) -> None:
        monkeypatch.setenv("HF_ENDPOINT", address)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        monkeypatch.setattr(
            huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + PATHS
        )
        reachable.cache_clear()
        responds.cache_clear()

    yield use
    reachable.cache_clear()
    responds.cache_clear()
