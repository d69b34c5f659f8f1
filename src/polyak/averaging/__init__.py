"""Everything that lives beside a running model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polyak.objects import lazy_names

_HOME_OF = {
    "Evaluation": "polyak.averaging.evaluate",
    "Follower": "polyak.averaging.followers",
    "WriteBack": "polyak.averaging.followers",
}

if TYPE_CHECKING:
    from polyak.averaging.evaluate import Evaluation as Evaluation
    from polyak.averaging.followers import Follower as Follower
    from polyak.averaging.followers import WriteBack as WriteBack

__getattr__, __dir__, __all__ = lazy_names(__name__, _HOME_OF)
