//! A configuration file: no panic, whatever is in it; what is wrong is shown at its place; what is good reads back as it was written.
//!
//! The input is the file.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::{fs, path::PathBuf, sync::LazyLock};
use tidegate::config::{FileSource, Sources, load};

/// In memory where there is such a folder.
static FILE: LazyLock<PathBuf> = LazyLock::new(|| {
    let folder = PathBuf::from("/dev/shm");
    let folder = if folder.is_dir() { folder } else { std::env::temp_dir() };
    folder.join(format!("tidegate-fuzz-{}.toml", std::process::id()))
});

fn read(text: &[u8]) -> Result<String, String> {
    fs::write(&*FILE, text).expect("a file of our own");
    let file = FileSource::Named { path: FILE.clone(), by: "--config" };
    match load(&Sources { file, env: Vec::new(), listen: None, upstream: None }) {
        Ok(loaded) => Ok(loaded.settings.to_toml()),
        Err(findings) => Err(findings.to_string()),
    }
}

fuzz_target!(|text: &[u8]| {
    match read(text) {
        Ok(effective) => assert_eq!(read(effective.as_bytes()).as_ref(), Ok(&effective), "what is effective is not what was written"),
        Err(findings) => assert!(findings.contains(" --> "), "an error without a place: {findings}"),
    }
});
