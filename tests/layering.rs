//! Holds the tree to its shape: each floor uses only those below it, unsafe code stays on the floors that are allowed
//! to have it, every file says what it is for, and none outgrows its idea.
//!
//! It reads the source as text. Comments do not count; a `use` spread over lines does.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// The floors from the top down; beneath all of them stand `units` and `error`, and the switches of `canary`.
const FLOORS: [&str; 7] = ["cli", "containerd", "daemon", "export", "io", "engine", "format"];
const FOUNDATION: [&str; 3] = ["units", "error", "canary"];
/// Where every unsafe block is forbidden by attribute. The rest states its `SAFETY` (clippy sees to that).
const WITHOUT_UNSAFE: [&str; 5] = ["format", "engine", "daemon", "containerd", "cli"];
const LONGEST_FILE_LINES: usize = 700;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// All Rust files below `folder`, with their text.
fn sources(folder: &str) -> BTreeMap<PathBuf, String> {
    fn walk(folder: &Path, into: &mut BTreeMap<PathBuf, String>) {
        for entry in fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display())) {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(&path, into);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = fs::read_to_string(&path).unwrap();
                into.insert(path.strip_prefix(root()).unwrap().to_owned(), text);
            }
        }
    }
    let mut found = BTreeMap::new();
    if root().join(folder).exists() {
        walk(&root().join(folder), &mut found);
    }
    found
}

/// The text without comments and string literals, so that prose about a floor is no use of it.
fn code_only(text: &str) -> String {
    let mut code = String::with_capacity(text.len());
    for line in text.lines() {
        let line = line.split("//").next().unwrap_or_default();
        let mut in_string = false;
        let mut escaped = false;
        for character in line.chars() {
            match character {
                '"' if !escaped => in_string = !in_string,
                _ if !in_string => code.push(character),
                _ => {}
            }
            escaped = character == '\\' && !escaped;
        }
        code.push('\n');
    }
    code
}

/// The first path segments named after every `crate::` in `code`: one, or all of a braced list.
fn used_modules(code: &str) -> Vec<String> {
    let squeezed: String = code.split_whitespace().collect::<Vec<_>>().join(" ");
    let mut modules = Vec::new();
    for (at, _) in squeezed.match_indices("crate::") {
        // `$crate::` names the root too; `some_crate::` does not.
        let before = squeezed[..at].chars().next_back();
        if before.is_some_and(|character| character.is_alphanumeric() || character == '_') {
            continue;
        }
        let rest = &squeezed[at + "crate::".len()..];
        if let Some(list) = rest.strip_prefix('{') {
            let mut depth = 0;
            let mut segment = String::new();
            for character in list.chars() {
                match character {
                    '{' => depth += 1,
                    '}' if depth == 0 => break,
                    '}' => depth -= 1,
                    ',' if depth == 0 => modules.push(std::mem::take(&mut segment)),
                    _ if depth == 0 => segment.push(character),
                    _ => {}
                }
            }
            modules.push(segment);
        } else {
            modules.push(rest.to_owned());
        }
    }
    modules
        .into_iter()
        .map(|segment| {
            segment
                .trim_start()
                .chars()
                .take_while(|character| character.is_alphanumeric() || *character == '_')
                .collect()
        })
        .filter(|segment: &String| !segment.is_empty())
        .collect()
}

/// The floor that a file of `src` belongs to: its folder, or the file's own name at the top.
fn floor_of(path: &Path) -> String {
    let below_src = path.strip_prefix("src").unwrap();
    let first = below_src.components().next().unwrap().as_os_str().to_str().unwrap();
    first.trim_end_matches(".rs").to_owned()
}

#[test]
fn floors_use_only_floors_below_them() {
    let mut faults = Vec::new();
    let mut uses = 0;
    for (path, text) in sources("src") {
        let floor = floor_of(&path);
        if floor == "lib" || floor == "main" {
            continue;
        }
        let allowed: Vec<&str> = match FLOORS.iter().position(|name| *name == floor) {
            Some(position) => FLOORS[position..].iter().chain(&FOUNDATION).copied().collect(),
            None if FOUNDATION.contains(&floor.as_str()) => FOUNDATION.to_vec(),
            None => {
                faults.push(format!("{}: `{floor}` is not a floor of the design", path.display()));
                continue;
            }
        };
        let name = path.file_name().unwrap().to_str().unwrap();
        if name == "tests.rs" || name.ends_with("_tests.rs") {
            // Tests of a floor may stand on the ones above it: the engine's run on memory storage.
            continue;
        }
        let code = code_only(&text);
        let code = code.split("#[cfg(test)]").next().unwrap_or_default();
        for used in used_modules(code) {
            uses += 1;
            if (FLOORS.contains(&used.as_str()) || FOUNDATION.contains(&used.as_str()))
                && !allowed.contains(&used.as_str())
            {
                faults.push(format!("{}: `{floor}` uses `{used}`, which stands above it", path.display()));
            }
        }
    }
    assert!(uses > 0, "no `crate::` path was found at all: this test no longer reads the source right");
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn floors_without_unsafe_forbid_it() {
    let library = fs::read_to_string(root().join("src/lib.rs")).unwrap();
    let everywhere = library.contains("#![forbid(unsafe_code)]");
    let mut faults = Vec::new();
    for floor in WITHOUT_UNSAFE {
        let module = fs::read_to_string(root().join(format!("src/{floor}/mod.rs"))).unwrap();
        if !everywhere && !module.contains("#![forbid(unsafe_code)]") {
            faults.push(format!("src/{floor}/mod.rs lacks #![forbid(unsafe_code)]"));
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn every_file_says_what_it_is_for() {
    let faults: Vec<String> = ["src", "tests", "benches"]
        .iter()
        .flat_map(|folder| sources(folder))
        .filter(|(_, text)| !text.starts_with("//!"))
        .map(|(path, _)| format!("{} does not open with //!", path.display()))
        .collect();
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn no_file_outgrows_its_idea() {
    let faults: Vec<String> = ["src", "tests", "benches"]
        .iter()
        .flat_map(|folder| sources(folder))
        .map(|(path, text)| (path, text.lines().count()))
        .filter(|(_, lines)| *lines > LONGEST_FILE_LINES)
        .map(|(path, lines)| format!("{}: {lines} lines; split it before {LONGEST_FILE_LINES}", path.display()))
        .collect();
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn scanner_sees_lists_and_ignores_prose() {
    let code = code_only(
        "use crate::{cli::{a, b}, error::Result};\n// crate::daemon\nlet x = \"crate::io\"; $crate::units::y();",
    );
    assert_eq!(used_modules(&code), ["cli", "error", "units"]);
}
