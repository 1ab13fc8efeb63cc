"""The web app: `make app`, or `streamlit run app.py`."""

if __name__ == "__main__":  # a worker process reads this file too, under another name: it has nothing to draw
    import streamlit as st

    from advisor.ui import style, warm
    from advisor.ui.navigation import pages

    st.set_page_config(
        page_title="advisor: vLLM or DeepSpeed", page_icon="🧮", layout="wide", initial_sidebar_state=340
    )
    warm.start()
    st.html(style.css())
    # every page has a side bar from its first moment on: one that came later would push the page aside
    st.sidebar.caption("Every setting is in the address: copy it to keep this view or to send it.")
    with st.container(key="hint"):
        st.caption("Settings and pages are behind the arrows at the top left.")
    st.navigation(pages(), position="top").run()
