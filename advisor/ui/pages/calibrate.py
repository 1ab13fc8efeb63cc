"""Calibrate: your own run records against the model, without refitting anything."""

from __future__ import annotations

import streamlit as st

from advisor.fit.validate import summary
from advisor.ui import accuracy, parts
from advisor.ui.command import shell
from advisor.ui.text import plain
from advisor.units import MIB


def render() -> None:
    """Show the page."""
    st.title("Your measurements against the model")
    st.markdown(
        "Upload run records of vLLM (JSON lines, one measured cell a line; the repository's docs/calibration.md says"
        " how to make them). Every cell is predicted from its own configuration; nothing measured enters a prediction,"
        " and nothing is kept."
    )
    limit = accuracy.MAX_UPLOAD_BYTES // MIB
    upload = st.file_uploader(
        f"Run records (.jsonl, at most {limit} MiB)", type=["jsonl", "json"], key="records", max_upload_size=limit
    )
    if upload is None:
        st.caption("The Trust page shows the same for the records that come with the package.")
        st.stop()
    rows = accuracy.validate_upload(upload.name, upload.getvalue())
    accuracy.headline(summary(rows)["overall"])
    accuracy.of_the_fit(rows)
    accuracy.show_rows(rows, "calibrate")
    parts.equal_command(shell(["advisor", "validate", upload.name]))
    st.caption(plain("`advisor fit` on the same file makes coefficients of your own."))
