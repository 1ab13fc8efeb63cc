"""The files that start a plan: choose one, read it, download it."""

from __future__ import annotations

from typing import Any

import streamlit as st

from advisor.emit import PURPOSES, artefacts_for
from advisor.schema import Plan
from advisor.ui import call, parts, state
from advisor.ui.text import plain


def artefacts(plan: Plan, request: dict[str, Any]) -> None:
    """Show the command of a plan, and one of its artefacts to read and download."""
    st.code(plan.command, language="bash", wrap_lines=True)
    names = artefacts_for(plan.backend)
    name = state.choice(
        "file", "File to download", names, default=names[0], help="Each is written for its tool's own parser."
    )
    st.caption(plain(PURPOSES[name]))
    text, file_name, problem = call.artefact(name, plan, request)
    if problem:
        st.info(plain(problem))
        return
    st.download_button(
        f"Download {file_name}",
        text,
        file_name,
        "text/plain",
        key="artefact",
        on_click="ignore",
        icon=":material/download:",
    )
    with st.expander(f"Read {file_name}"):
        language = {"yaml": "yaml", "py": "python", "sh": "bash"}.get(file_name.rsplit(".", 1)[-1], "text")
        st.code(text, language=language, height=parts.FILE_PX)
