"""Works with trained adapters: inspects, combines and renames their experts."""
