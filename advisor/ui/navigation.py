"""Which pages there are, in which order."""

from __future__ import annotations

import streamlit as st
from streamlit.navigation.page import StreamlitPage

from advisor.ui.call import page
from advisor.ui.pages import audit, calibrate, capacity, compare, explore, recommend, train, trust

PAGES = {
    "Recommend": recommend.render,
    "Compare": compare.render,
    "Explore": explore.render,
    "Train": train.render,
    "Capacity": capacity.render,
    "Trust": trust.render,
    "Audit": audit.render,
    "Calibrate": calibrate.render,
}
"""Title of each page, which is its path in small letters too, with what shows it."""


def pages() -> list[StreamlitPage]:
    """Return the pages of the navigation; the first one opens without a path."""
    return [
        st.Page(page(render), title=title, url_path=title.lower(), default=i == 0)
        for i, (title, render) in enumerate(PAGES.items())
    ]
