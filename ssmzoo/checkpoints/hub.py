"""Models on the Hugging Face hub, fetched by ``huggingface_hub`` into its cache. No code from there is ever run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ssmzoo.checkpoints.tensors import line

ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
TOKENIZER = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"]
DESCRIPTIONS = ["config.json", "config.yaml", *TOKENIZER]
SAFETENSORS = ["model*.safetensors", "model.safetensors.index.json"]
PICKLES = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]  # read as weights alone


def hub_id(given: object) -> str | None:
    """The text, if it can be the name of a model on the hub and is no path of something that is there."""
    if not isinstance(given, str) or not ID.fullmatch(given) or given.endswith((".yaml", ".yml", ".pth", ".gguf")):
        return None
    return None if Path(given).exists() else given


def fetch(name: str, revision: str | None = None) -> tuple[Path, str]:
    """A model of the hub in the local cache: its config, weights (as safetensors if it has them) and tokenizer.

    Args:
        name: such as "state-spaces/mamba-130m-hf".
        revision: a branch, tag or commit; the newest of the main branch if None.

    Returns:
        The folder in the cache, and the name with the commit that it holds, ``name@commit``.

    Raises:
        ImportError: ``huggingface_hub`` is not installed.
        FileNotFoundError: no such model or revision, or none in the cache while ``HF_HUB_OFFLINE`` is set.
        PermissionError: its owners give it to those alone who have accepted its terms.
        ConnectionError: the hub is out of reach or fails, and it is not in the cache.
        OSError: it cannot be written into the cache, as on a full disk.
    """
    try:
        import huggingface_hub
        from huggingface_hub import constants, errors
    except ImportError:
        raise ImportError(
            f"{name} is on the Hugging Face hub, which needs huggingface_hub: pip install 'ssmzoo[hf]'"
        ) from None

    def get(patterns: list[str]) -> Path:
        options: dict[str, Any] = {"revision": revision, "allow_patterns": patterns}
        return Path(huggingface_hub.snapshot_download(name, **options))

    try:
        folder = get([*DESCRIPTIONS, *SAFETENSORS])
        if not any(folder.glob("*.safetensors")):
            folder = get([*DESCRIPTIONS, *PICKLES])
    except errors.GatedRepoError:
        raise PermissionError(
            f"{name} on the Hugging Face hub is gated: accept its terms at huggingface.co/{name}, and log in by "
            "`hf auth login`"
        ) from None
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError) as error:
        at = "" if revision is None else f" at revision {revision!r:.80}"
        raise FileNotFoundError(
            f"no path {name}, and no such model from the Hugging Face hub{at}: {line(error):.300}"
        ) from None
    except Exception as error:
        at_home = isinstance(error, OSError) and not isinstance(
            error, errors.HfHubHTTPError | ConnectionError | TimeoutError
        )
        if at_home and not isinstance(error, errors.LocalEntryNotFoundError):
            raise  # of the system
        if constants.HF_HUB_OFFLINE:
            raise FileNotFoundError(
                f"no path {name}, and no such model in the cache of the Hugging Face hub; HF_HUB_OFFLINE keeps it from "
                "being fetched"
            ) from None
        raise ConnectionError(
            f"{name} is not in the cache, and could not be fetched from the Hugging Face hub: {line(error):.300}"
        ) from None
    return folder, f"{name}@{folder.name}"
