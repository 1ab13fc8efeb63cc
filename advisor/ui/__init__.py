"""The web app: pages as functions over the same API as the command line; no number is computed here."""
