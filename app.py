"""The web app: `make app`, or `streamlit run app.py`."""

import streamlit as st

from advisor.ui.navigation import pages

st.set_page_config(page_title="advisor: vLLM or DeepSpeed", page_icon="🧮", layout="wide", initial_sidebar_state=340)
st.navigation(pages(), position="top").run()
