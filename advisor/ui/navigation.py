"""Which pages there are, in which order."""

from __future__ import annotations

import streamlit as st
from streamlit.navigation.page import StreamlitPage

from advisor.ui.call import page
from advisor.ui.pages import audit, calibrate, capacity, compare, explore, recommend, train, trust

PAGES = {
    "Recommend": (recommend.render, ":material/recommend:"),
    "Compare": (compare.render, ":material/compare_arrows:"),
    "Explore": (explore.render, ":material/query_stats:"),
    "Train": (train.render, ":material/model_training:"),
    "Capacity": (capacity.render, ":material/calendar_view_day:"),
    "Trust": (trust.render, ":material/verified:"),
    "Audit": (audit.render, ":material/fact_check:"),
    "Calibrate": (calibrate.render, ":material/tune:"),
}
"""Title of each page, which is its path in small letters too, with what shows it."""


def pages() -> list[StreamlitPage]:
    """Return the pages of the navigation; the first one opens without a path."""
    return [
        st.Page(page(render), title=title, url_path=title.lower(), default=i == 0, icon=icon)
        for i, (title, (render, icon)) in enumerate(PAGES.items())
    ]
