"""Ways of compressing that were tried for their loss, and are not offered, as strategies of the benchmarks.

Written plainly, for the loss alone: matrix by matrix, in torch, all of a backward pass in one bucket, and nothing is
hidden. ``power.py`` and ``one_message.py`` have the methods, ``rounding.py`` what few bits leave of a message,
``hook.py`` the DDP hook that sends what they want sent. Their names: :data:`FORMS`.
"""

from .naming import FORMS, Name

__all__ = ["FORMS", "Name"]
