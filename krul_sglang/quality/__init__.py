"""How much an answer changes when the KV cache it continues from was restored."""
