"""Names that may go into a file: model arguments, labels, comments; untrusted text is checked or cleaned here."""

from __future__ import annotations

import hashlib
import re

from advisor.errors import DomainError, printable
from advisor.schema import Model

# RFC 1123 label: what Kubernetes, Docker and SLURM all accept as a name.
LABEL_MAX_LENGTH = 50


def model_argument(model: Model) -> str:
    """Return what a launch line names: the folder of the user's own checkpoint, else its hub id, else its name.

    Raises:
        DomainError: the name is empty, starts with '-' (it would read as an option) or holds control characters.
    """
    name = model.folder or model.hf_id or model.name
    if not name.strip() or name.startswith("-") or not name.isprintable():
        raise DomainError(
            f"model '{printable(name)}' cannot stand in a command; it must be printable, not empty, without a leading -"
        )
    return name


def label(text: str) -> str:
    """Return text as an RFC 1123 label: lower case, digits and '-', at most 50 characters, never empty.

    Text that had to change keeps apart from its like by six digits of its SHA-256.
    """
    lowered = text.lower()
    clean = re.sub(r"[^a-z0-9]+", "-", lowered).strip("-")
    if clean == lowered.replace("/", "-").replace(".", "-").replace("_", "-") and 0 < len(clean) <= LABEL_MAX_LENGTH:
        return clean
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:6]
    return f"{clean[: LABEL_MAX_LENGTH - 7].strip('-') or 'model'}-{digest}"


def comment(text: str, width: int = 110) -> str:
    """Return text as one line that is safe behind '# ': no control characters, cut to a width."""
    return printable(text, limit=width)
