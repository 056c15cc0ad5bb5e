//! `tidegate completions` and `tidegate man`: made from the command line itself, so they say what it takes.
//!
//! Only with the feature `manual`: packages want both, and an image without a shell has no use for either. The schema of
//! `tidegate config --schema` belongs to it for the same reason.

use std::{fs, io, path::Path};

use anyhow::Context as _;
use clap::Command;
use clap_complete::Shell;
use clap_mangen::{
    Man,
    roff::{Inline, Roff, bold, roman},
};

/// What the page of the whole has besides its options and subcommands: each section's title, with its terms and what they mean.
const SECTIONS: [(&str, &[(&str, &str)]); 4] = [
    (
        "EXIT STATUS",
        &[
            ("0", "Success; after any drain."),
            ("1", "Running failed."),
            ("2", "The command line cannot be understood."),
            ("78", "The configuration cannot be used."),
        ],
    ),
    (
        "SIGNALS",
        &[
            (
                "SIGTERM, SIGINT",
                "Drain: go on accepting for drain.delay, then end sessions one by one over drain.window, each with a Close. A second one ends \
                 all at once, still with a Close; a third does not wait for the answers.",
            ),
            ("SIGHUP", "Read the configuration again. With a mistake in it everything stays as it is."),
            (
                "SIGUSR2",
                "Start the binary anew, and hand the listening sockets on to it. This process drains when the new one is ready, and goes on \
                 when that fails.",
            ),
        ],
    ),
    (
        "ENVIRONMENT",
        &[
            ("TIDEGATE_CONFIG", "The configuration file, where --config names none."),
            ("TIDEGATE_SECTION__KEY", "A key of the configuration, over the file: TIDEGATE_CLOSE__DELAY=0ms."),
            (
                "LISTEN_FDS, LISTEN_FDNAMES",
                "Listening sockets, which are used in place of listen.address: sd_listen_fds(3).",
            ),
            ("NOTIFY_SOCKET, WATCHDOG_USEC", "A service manager that is told what the process is doing: sd_notify(3)."),
        ],
    ),
    (
        "FILES",
        &[
            ("./proxy.toml", "The configuration."),
            (
                "/etc/tidegate/proxy.toml",
                "The same, where there is none in the working directory. Every key with its default: tidegate config --default.",
            ),
        ],
    ),
];

/// What a shell reads.
pub(super) fn completions(mut command: Command, shell: Shell) -> anyhow::Result<String> {
    let name = command.get_name().to_owned();
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut command, name, &mut text);
    Ok(String::from_utf8(text)?)
}

/// The page of a subcommand, or that of the whole.
pub(super) fn page(command: Command, of: Option<&str>) -> anyhow::Result<String> {
    let command = built(command);
    let page = match of {
        None => whole(&command)?,
        Some(name) => {
            let known = || command.get_subcommands().map(Command::get_name).collect::<Vec<_>>().join(", ");
            let found = command.get_subcommands().find(|found| found.get_name() == name);
            part(found.with_context(|| format!("there is no page of {name:?}: there are those of {}", known()))?)?
        }
    };
    Ok(String::from_utf8(page)?)
}

/// All pages, each in a file that is named as `man` looks for it.
pub(super) fn pages(command: Command, folder: &Path) -> anyhow::Result<()> {
    let command = built(command);
    let write = |name: &str, page: Vec<u8>| {
        let file = folder.join(format!("{name}.1"));
        fs::write(&file, page).with_context(|| format!("cannot write {}", file.display()))
    };
    write(command.get_name(), whole(&command)?)?;
    for subcommand in command.get_subcommands() {
        write(&full_name(subcommand), part(subcommand)?)?;
    }
    Ok(())
}

/// Without clap's own `help`, and with all names in full.
fn built(command: Command) -> Command {
    let mut command = command.disable_help_subcommand(true);
    command.build();
    command
}

/// As in "tidegate-run".
fn full_name(command: &Command) -> String {
    command.get_display_name().unwrap_or(command.get_name()).to_owned()
}

fn man(command: &Command) -> Man {
    Man::new(command.clone()).source(format!("tidegate {}", env!("CARGO_PKG_VERSION"))).manual("User Commands")
}

fn whole(command: &Command) -> io::Result<Vec<u8>> {
    let man = man(command);
    let mut page = Vec::new();
    man.render_title(&mut page)?;
    man.render_name_section(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    man.render_description_section(&mut page)?;
    man.render_options_section(&mut page)?;
    man.render_subcommands_section(&mut page)?;
    let mut roff = Roff::new();
    for (title, entries) in SECTIONS {
        roff.control("SH", [title]);
        for (term, meaning) in entries {
            roff.control("TP", []).text([bold(*term)]).text([roman(*meaning)]);
        }
    }
    let pages: Vec<String> = command.get_subcommands().map(full_name).collect();
    see_also(&mut roff, &pages);
    roff.to_writer(&mut page)?;
    Ok(page)
}

fn part(command: &Command) -> io::Result<Vec<u8>> {
    let man = man(command);
    let mut page = Vec::new();
    man.render_title(&mut page)?;
    man.render_name_section(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    man.render_description_section(&mut page)?;
    man.render_options_section(&mut page)?;
    if let Some(more) = command.get_after_help() {
        let mut roff = Roff::new();
        roff.control("SH", ["NOTES"]);
        for line in more.to_string().lines() {
            roff.control("PP", []).text([roman(line)]);
        }
        roff.to_writer(&mut page)?;
    }
    let mut roff = Roff::new();
    see_also(&mut roff, &["tidegate".to_owned()]);
    roff.to_writer(&mut page)?;
    Ok(page)
}

fn see_also(roff: &mut Roff, pages: &[String]) {
    roff.control("SH", ["SEE ALSO"]);
    let mut line: Vec<Inline> = Vec::new();
    for page in pages {
        line.push(roman(if line.is_empty() { "" } else { ", " }));
        line.extend([bold(page), roman("(1)")]);
    }
    roff.text(line);
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::{super::Cli, *};

    /// Each subcommand has a page and is in the completions of each shell: one that is added later has, too.
    #[test]
    fn every_subcommand_is_in_all_of_it() {
        let folder = tempfile::tempdir().unwrap();
        pages(Cli::command(), folder.path()).unwrap();
        let read = |name: &str| fs::read_to_string(folder.path().join(format!("{name}.1"))).unwrap();
        let whole = read("tidegate");
        let command = built(Cli::command());
        let names: Vec<&str> = command.get_subcommands().map(Command::get_name).collect();
        assert!(!whole.contains("help(1)"), "{whole}");
        assert!(names.contains(&"run") && names.contains(&"man"), "{names:?}");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), names.len() + 1);
        for name in names {
            let escaped = format!("tidegate\\-{name}");
            assert!(whole.contains(&escaped), "{name}: {whole}");
            let page = read(&format!("tidegate-{name}"));
            assert!(page.contains(&format!("{escaped} \\- ")), "{page}");
            assert_eq!(super::page(Cli::command(), Some(name)).unwrap(), page);
            for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
                assert!(completions(Cli::command(), shell).unwrap().contains(name), "{shell}: {name}");
            }
        }
        assert_eq!(super::page(Cli::command(), None).unwrap(), whole);
        let error = super::page(Cli::command(), Some("fly")).unwrap_err().to_string();
        assert!(error.starts_with("there is no page of \"fly\": there are those of run, demo, "), "{error}");
    }
}
