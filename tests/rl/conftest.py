from collections.abc import Iterator

import pytest

from tests.builders import without_checks


@pytest.fixture
def unchecked() -> Iterator[None]:
    with without_checks():
        yield
