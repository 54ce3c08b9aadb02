"""Where experts live and how they move: store, pool, residency, link, engine. Knows pages, not transformers."""
