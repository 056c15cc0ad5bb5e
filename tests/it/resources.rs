//! Little of everything.
