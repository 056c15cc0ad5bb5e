//! What peers cost that take nothing, or give only half.
