//! Man pages and completions: one for each command that the help shows, none for what it hides.

use std::collections::BTreeSet;
use std::fs;

use crate::scratch::Scratch;
use crate::support::command::shell;

/// All commands that the help shows, by asking it for each.
fn shown(scratch: &Scratch, command: &str, into: &mut BTreeSet<String>) {
    into.insert(command.to_owned());
    let help = scratch.done(&format!("{command} --help"));
    let listed = help.lines().skip_while(|line| *line != "Commands:").skip(1).take_while(|line| !line.is_empty());
    // A description that goes on in the next line is further to the right.
    for line in listed.filter(|line| line.starts_with("  ") && !line.starts_with("   ")) {
        let name = line.split_whitespace().next().expect("a name");
        if name != "help" {
            shown(scratch, format!("{command} {name}").trim(), into);
        }
    }
}

#[test]
fn every_shown_command_has_a_man_page_and_no_other() {
    let scratch = Scratch::empty();
    scratch.done("documents written");
    let mut commands = BTreeSet::new();
    shown(&scratch, "", &mut commands);
    assert!(commands.len() > 30, "{commands:?}");
    let expected: BTreeSet<String> =
        commands.iter().map(|command| format!("{}.1", format!("plywood {command}").trim().replace(' ', "-"))).collect();
    let files = fs::read_dir(scratch.path("written")).expect("the folder").flatten();
    let names = files.map(|file| file.file_name().to_string_lossy().into_owned());
    let written: BTreeSet<String> = names.filter(|name| name.ends_with(".1")).collect();
    assert_eq!(written, expected);
    for name in written {
        let page = fs::read_to_string(scratch.path("written").join(&name)).expect("a page");
        assert!(page.contains(".TH") && page.contains(".SH SYNOPSIS"), "{name}:\n{page}");
    }
}

#[test]
fn completions_offer_what_is_shown() {
    let scratch = Scratch::empty();
    scratch.done("documents written");
    let completion = |words: &str| {
        let script = format!(
            "source {}; COMP_WORDS=({words} ''); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); \
             _plywood plywood '' ${{COMP_WORDS[COMP_CWORD - 1]}}; echo \"${{COMPREPLY[@]}}\"",
            scratch.path("written/plywood.bash").display()
        );
        let offered = crate::support::command::run("bash", ["-c", &script]).expect();
        offered.split_whitespace().map(str::to_owned).collect::<BTreeSet<_>>()
    };
    let first = completion("plywood");
    for name in ["pool", "volume", "attach", "upgrade", "--pool"] {
        assert!(first.contains(name), "{name} is not among {first:?}");
    }
    for hidden in ["engine", "loop-helper", "documents", "device-name"] {
        assert!(!first.contains(hidden), "{hidden} is among {first:?}");
    }
    assert!(completion("plywood volume").contains("create"));
    for (file, marks) in [("_plywood", "#compdef plywood"), ("plywood.fish", "complete -c plywood")] {
        let text = fs::read_to_string(scratch.path("written").join(file)).expect("a file");
        assert!(text.contains(marks) && !text.contains("loop-helper"), "{file}");
    }
    shell(&format!("bash -n {}", scratch.path("written/plywood.bash").display())).expect();
}
