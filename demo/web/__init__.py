"""The web demo: chat on a live server, and what Krul does meanwhile. Imports no sglang."""
