//! Listeners that close, and listeners that are handed on, while clients connect as fast as they can: none of them is reset.
