"""Is the Hugging Face Hub within reach? Asked once, so that a machine with no network hears it in one line."""

from __future__ import annotations

import os
import socket
from functools import lru_cache
from urllib.parse import urlsplit

from huggingface_hub import constants

_TIMEOUT = 5.0  # seconds


@lru_cache(maxsize=1)
def hub_is_offline() -> bool:
    """True under HF_HUB_OFFLINE or where no connection opens; the process is then put in HF's offline mode.

    Offline mode reads the local Hub cache and fails at once where it holds nothing. Without it huggingface_hub tries
    each file six times, 28 seconds, whatever HF_HUB_ETAG_TIMEOUT says. Behind a proxy the direct connection says
    nothing, so the Hub counts as reachable.
    """
    if constants.HF_HUB_OFFLINE:
        return True
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return False
    address = urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection((address.hostname, address.port or 443), timeout=_TIMEOUT).close()
        return False
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"  # for libraries not imported yet (datasets)
        constants.HF_HUB_OFFLINE = True
        return True
