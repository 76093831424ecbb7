"""The coordinator: decides what is computed when (pure modules), performs it, and serves clients."""
