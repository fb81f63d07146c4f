//! Who the process is: `USER[:GROUP]` of an image's configuration, by name or number, looked up in the image's own
//! `/etc/passwd` and `/etc/group` (image specification, config.md, "User").

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;

use anyhow::{Context as _, Result};
use rustix::fs::{Mode, OFlags, ResolveFlags};

/// Longest file of accounts that is read.
const LIMIT_BYTES: u64 = 4 << 20;

/// Numbers for the kernel, and the home directory for `$HOME`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Further groups.
    pub groups: Vec<u32>,
    /// Home directory.
    pub home: String,
}

/// Looks up `wanted`, empty for root, in the root file system `root`.
///
/// # Errors
///
/// A name is not there, or a number is none.
pub fn find(root: &OwnedFd, wanted: &str) -> Result<User> {
    let read = |path: &str| read_inside(root, path).unwrap_or_default();
    resolve(wanted, &read("etc/passwd"), &read("etc/group"))
}

/// A file of the image, which may be a link to anywhere: it is resolved inside the image.
fn read_inside(root: &OwnedFd, path: &str) -> Result<String> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let file = File::from(rustix::fs::openat2(root, path, flags, Mode::empty(), resolve)?);
    let mut bytes = Vec::new();
    if file.metadata()?.is_file() {
        file.take(LIMIT_BYTES).read_to_end(&mut bytes)?;
    }
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn resolve(wanted: &str, accounts: &str, groups: &str) -> Result<User> {
    let (name, group) = wanted.split_once(':').map_or((wanted, None), |(name, group)| (name, Some(group)));
    let name = if name.is_empty() { "0" } else { name };
    let number: Option<u32> = name.parse().ok();
    let accounts = accounts.lines().map(|line| line.split(':').collect::<Vec<_>>());
    let account = accounts.filter(|fields| fields.len() >= 6).find(|fields| match number {
        Some(number) => fields[2].parse() == Ok(number),
        None => fields[0] == name,
    });
    let field = |index: usize| account.as_ref().and_then(|fields| fields[index].parse::<u32>().ok());
    let uid = number.or_else(|| field(2)).with_context(|| format!("the image has no user {name}"))?;
    let login = account.as_ref().map(|fields| fields[0]);
    let lines = || groups.lines().map(|line| line.split(':').collect::<Vec<_>>()).filter(|fields| fields.len() >= 4);
    let (gid, further) = match group.filter(|group| !group.is_empty()) {
        // A group that is asked for stands alone.
        Some(group) => {
            let named = || lines().find(|fields| fields[0] == group).and_then(|fields| fields[2].parse().ok());
            let gid = group.parse().ok().or_else(named).with_context(|| format!("the image has no group {group}"))?;
            (gid, Vec::new())
        }
        None => {
            let gid = field(3).unwrap_or(0);
            let is_member =
                |fields: &Vec<&str>| login.is_some_and(|login| fields[3].split(',').any(|one| one == login));
            let further = lines().filter(is_member).filter_map(|fields| fields[2].parse().ok()).collect();
            (gid, further)
        }
    };
    let home = account.as_ref().map(|fields| fields[5]).filter(|home| !home.is_empty()).unwrap_or("/");
    Ok(User { uid, gid, groups: further, home: home.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    const ACCOUNTS: &str =
        "root:x:0:0:root:/root:/bin/bash\ndaemon:x:1:1::/usr/sbin:\nbroken\nweb:x:33:34::/var/www:\n";
    const GROUPS: &str = "root:x:0:\nadm:x:4:syslog,web\nweb:x:34:\nstaff:x:50:web\n";

    #[test]
    fn users_are_found_by_name_and_number() {
        let user = |wanted: &str| resolve(wanted, ACCOUNTS, GROUPS).unwrap();
        assert_eq!(user(""), User { uid: 0, gid: 0, groups: vec![], home: "/root".into() });
        let web = User { uid: 33, gid: 34, groups: vec![4, 50], home: "/var/www".into() };
        assert_eq!(user("web"), web);
        assert_eq!(user("33"), web);
        assert_eq!(user("web:staff"), User { gid: 50, groups: vec![], ..web.clone() });
        assert_eq!(user("33:7"), User { gid: 7, groups: vec![], ..web });
        assert_eq!(user("1234"), User { uid: 1234, gid: 0, groups: vec![], home: "/".into() });
    }

    #[test]
    fn unknown_names_are_refused() {
        for wanted in ["nobody", "web:nogroup", "-1", "web:-1"] {
            assert!(resolve(wanted, ACCOUNTS, GROUPS).is_err(), "{wanted}");
        }
        assert!(resolve("root", "", "").is_err());
        assert_eq!(resolve("0:0", "", "").unwrap().uid, 0);
    }

    #[test]
    fn account_file_that_links_out_of_the_image_is_read_inside() {
        let place = tempfile::tempdir().unwrap();
        std::fs::create_dir(place.path().join("etc")).unwrap();
        std::os::unix::fs::symlink("/etc/other", place.path().join("etc/passwd")).unwrap();
        std::fs::write(place.path().join("etc/other"), "inside:x:5:6::/home:\n").unwrap();
        let root = OwnedFd::from(File::open(place.path()).unwrap());
        assert_eq!(find(&root, "inside").unwrap().uid, 5);
        // The host's root has a home, the image's has none.
        assert_eq!(find(&root, "0").unwrap().home, "/");
    }
}
