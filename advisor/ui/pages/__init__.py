"""One file a page; each has `render()`: inputs, one call, headline numbers, charts, table, downloads, command."""
