from tests.models.conftest import architecture

__all__ = ["architecture"]
