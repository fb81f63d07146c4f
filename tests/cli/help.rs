//! Help, pinned: a change of the command line is a change of a file in the repository.

use std::fs;
use std::path::PathBuf;

use crate::scratch::Scratch;

const COMMANDS: [&str; 65] = [
    "",
    "pool",
    "pool create",
    "pool info",
    "pool check",
    "pool dump",
    "pool restore",
    "pool repair",
    "pool scrub",
    "pool verify-on-read",
    "pool grow",
    "pool trim",
    "volume",
    "volume create",
    "volume list",
    "volume info",
    "volume rename",
    "volume resize",
    "volume export",
    "volume import",
    "volume delete",
    "volume on-full",
    "volume detect-zeroes",
    "volume verify-on-read",
    "volume protect",
    "snapshot",
    "snapshot create",
    "snapshot list",
    "snapshot seal",
    "snapshot delete",
    "snapshot rollback",
    "clone",
    "clone create",
    "attach",
    "detach",
    "mount",
    "unmount",
    "image",
    "image import",
    "image export",
    "image list",
    "image delete",
    "run",
    "ps",
    "commit",
    "docker-plugin",
    "demo",
    "diff",
    "send",
    "receive",
    "prune",
    "events",
    "metrics",
    "top",
    "doctor",
    "containerd",
    "serve",
    "stop",
    "help",
    "help pool",
    "help volume",
    "help snapshot",
    "help clone",
    "help image",
    "help run",
];

#[test]
fn help_is_as_pinned() {
    let scratch = Scratch::empty();
    let mut text = String::new();
    for command in COMMANDS {
        let line = if command.starts_with("help") {
            command.to_owned()
        } else {
            format!("{command} --help").trim().to_owned()
        };
        let mut prepared = scratch.prepare(line.split_whitespace());
        for variable in
            ["PLYWOOD_POOL", "PLYWOOD_MEMORY", "PLYWOOD_SEAL_RATE", "PLYWOOD_ON_THRESHOLD", "PLYWOOD_TRANSPORT"]
        {
            prepared.env_remove(variable);
        }
        let said = crate::support::command::run_command(prepared).expect();
        let said: Vec<&str> = said.lines().map(str::trim_end).collect();
        text.push_str(&format!("$ plywood {line}\n{}\n\n", said.join("\n")));
    }
    let pinned = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/help.txt");
    if std::env::var_os("PLYWOOD_PIN").is_some() {
        fs::create_dir_all(pinned.parent().expect("a folder")).expect("the folder of fixtures");
        fs::write(&pinned, &text).expect("writing the fixture");
    }
    let expected = fs::read_to_string(&pinned).expect("tests/fixtures/help.txt");
    for (number, (said, expected)) in text.lines().zip(expected.lines()).enumerate() {
        assert_eq!(said, expected, "line {} of tests/fixtures/help.txt; PLYWOOD_PIN=1 writes it anew", number + 1);
    }
    assert_eq!(text.lines().count(), expected.lines().count(), "PLYWOOD_PIN=1 writes the fixture anew");
}

#[test]
fn version_is_that_of_the_package() {
    assert_eq!(Scratch::empty().done("--version"), format!("plywood {}", env!("CARGO_PKG_VERSION")));
}

#[test]
fn hidden_commands_are_not_in_the_help() {
    let said = Scratch::empty().done("--help");
    for hidden in ["engine", "loop-helper", "documents", "device-name"] {
        assert!(!said.lines().any(|line| line.trim_start().starts_with(hidden)), "{hidden} is in the help:\n{said}");
    }
}

#[test]
fn command_lines_without_sense_end_with_2() {
    let scratch = Scratch::with_pool();
    for line in [
        "",
        "no-such-noun",
        "volume",
        "volume create",
        "volume create a",
        "volume create a --size",
        "volume create a --size ten",
        "volume create a --size -1G",
        "volume list --no-such-option",
        "volume resize a",
        "attach",
        "attach a --all",
        "diff a",
        "events --once --new",
        "top --interval 0",
        "top --interval often",
        "doctor --bundle",
        "serve --metrics 9100",
        "serve --metrics 0.0.0.0:9100",
        "serve --metrics 192.0.2.1:9100",
        "run",
    ] {
        scratch.misused(line);
    }
}

#[test]
fn missing_pool_is_a_matter_of_usage() {
    let scratch = Scratch::empty();
    for value in [None, Some("")] {
        let mut prepared = scratch.prepare(["pool", "info"]);
        match value {
            Some(value) => prepared.env("PLYWOOD_POOL", value),
            None => prepared.env_remove("PLYWOOD_POOL"),
        };
        let outcome = crate::support::command::run_command(prepared);
        assert_eq!(outcome.status.code(), Some(2), "{}", outcome.stderr);
        assert!(outcome.stderr.contains("--pool"), "{}", outcome.stderr);
    }
}
