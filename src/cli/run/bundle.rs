//! An OCI runtime bundle: `config.json` and the files that are bound over the container's own.
//!
//! The container's root file system is not written: `/etc/resolv.conf`, `/etc/hosts` and `/etc/hostname` come from the
//! bundle, `/dev`, `/proc` and `/sys` are mounted over what the image has there.

use std::fs;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use oci_spec::image::ImageConfiguration;
use oci_spec::runtime::{
    Capabilities, Capability, LinuxBuilder, LinuxCapabilitiesBuilder, LinuxDeviceCgroupBuilder, LinuxNamespaceType,
    LinuxResourcesBuilder, Mount, MountBuilder, ProcessBuilder, RootBuilder, Spec, SpecBuilder, UserBuilder,
    get_default_maskedpaths, get_default_mounts, get_default_namespaces, get_default_readonly_paths,
};
use serde::{Deserialize, Serialize};

use super::user;

const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What a container sees of the network.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Network {
    /// The host's.
    #[default]
    Host,
    /// A loopback of its own, which is down.
    None,
}

/// How a container is run.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Settings {
    /// The command.
    pub command: Vec<String>,
    /// The name that the container has for itself.
    pub hostname: String,
    /// Its network.
    pub network: Network,
    /// Whether it gets a terminal of its own; decided anew at each start.
    #[serde(skip)]
    pub terminal: bool,
    /// Its variables: `NAME=VALUE`.
    pub environment: Vec<String>,
    /// Its working directory, when not `/`.
    pub directory: Option<String>,
    /// Its user, when not root.
    pub user: Option<String>,
    /// Whether its root is mounted read-only.
    pub read_only: bool,
    /// What it sees beside its root, mounted anew at each start.
    #[serde(skip)]
    pub mounts: Vec<Mount>,
}

impl Settings {
    /// What was not chosen is as the image says; a command that was chosen replaces the image's entry point and its arguments.
    ///
    /// # Errors
    ///
    /// There is no command.
    pub fn on(mut self, image: &ImageConfiguration) -> Result<Self> {
        let config = image.config().clone().unwrap_or_default();
        if self.command.is_empty() {
            self.command = [config.entrypoint(), config.cmd()].into_iter().flatten().flatten().cloned().collect();
        }
        ensure!(!self.command.is_empty(), "the image names no command; give one: plywood run IMAGE -- COMMAND");
        let given = std::mem::replace(&mut self.environment, config.env().clone().unwrap_or_default());
        for entry in given {
            let name = entry.split_inclusive('=').next().unwrap_or_default();
            self.environment.retain(|variable| !variable.starts_with(name));
            self.environment.push(entry);
        }
        self.directory = self.directory.or(config.working_dir().clone()).filter(|directory| directory.starts_with('/'));
        self.user = self.user.or(config.user().clone());
        Ok(self)
    }
}

/// Writes the bundle of a container into `directory`, whose `rootfs` is mounted already.
///
/// # Errors
///
/// The settings do not fit the root's content, or the host refuses.
pub fn write(directory: &Path, settings: &Settings) -> Result<()> {
    let root = fs::File::open(directory.join("rootfs"))?;
    let mut mounts = get_default_mounts();
    // What is further up comes first, and our own files stand over all of it.
    let mut shown = settings.mounts.clone();
    shown.sort_by_key(|mount| mount.destination().components().count());
    mounts.extend(shown);
    for (name, content) in [
        ("resolv.conf", fs::read("/etc/resolv.conf").unwrap_or_default()),
        ("hosts", hosts(settings)),
        ("hostname", format!("{}\n", settings.hostname).into_bytes()),
    ] {
        let path = directory.join(name);
        fs::write(&path, content).with_context(|| path.display().to_string())?;
        mounts.push(bind(&path, &Path::new("/etc").join(name))?);
    }
    let spec = spec(settings, mounts, &OwnedFd::from(root))?;
    let path = directory.join("config.json");
    let mut file = fs::File::create(&path).with_context(|| path.display().to_string())?;
    file.write_all(&serde_json::to_vec_pretty(&spec)?)?;
    Ok(())
}

fn hosts(settings: &Settings) -> Vec<u8> {
    let mut hosts = match settings.network {
        Network::Host => fs::read("/etc/hosts").unwrap_or_default(),
        Network::None => b"127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n".to_vec(),
    };
    if !hosts.is_empty() && !hosts.ends_with(b"\n") {
        hosts.push(b'\n');
    }
    hosts.extend(format!("127.0.1.1\t{}\n", settings.hostname).bytes());
    hosts
}

fn bind(from: &Path, to: &Path) -> Result<Mount> {
    let options: Vec<String> = ["bind", "rprivate", "nosuid", "nodev", "noexec"].map(String::from).to_vec();
    let mount = MountBuilder::default().typ("bind").source(from).destination(to).options(options);
    Ok(mount.build()?)
}

fn spec(settings: &Settings, mounts: Vec<Mount>, root: &OwnedFd) -> Result<Spec> {
    let user = user::find(root, settings.user.as_deref().unwrap_or(""))?;
    let home = user.home.clone();
    let user = UserBuilder::default().uid(user.uid).gid(user.gid).additional_gids(user.groups).build()?;
    let process = ProcessBuilder::default()
        .terminal(settings.terminal)
        .user(user)
        .args(settings.command.clone())
        .env(environment(settings, &home))
        .cwd(PathBuf::from(settings.directory.as_deref().unwrap_or("/")))
        .capabilities(capabilities()?)
        .no_new_privileges(false)
        .build()?;
    let mut process = process;
    // The builder's default lowers the limit of open files to 1024; the caller's own is right.
    process.set_rlimits(None);
    let deny = LinuxDeviceCgroupBuilder::default().allow(false).access("rwm").build()?;
    let mut namespaces = get_default_namespaces();
    namespaces.retain(|one| settings.network == Network::None || one.typ() != LinuxNamespaceType::Network);
    let linux = LinuxBuilder::default()
        .namespaces(namespaces)
        // The nodes that every container has are let through by the runtime itself.
        .resources(LinuxResourcesBuilder::default().devices(vec![deny]).build()?)
        .masked_paths(get_default_maskedpaths())
        .readonly_paths(get_default_readonly_paths())
        .build()?;
    let spec = SpecBuilder::default()
        .version("1.0.2")
        .root(RootBuilder::default().path("rootfs").readonly(settings.read_only).build()?)
        .hostname(settings.hostname.clone())
        .mounts(mounts)
        .process(process)
        .linux(linux);
    Ok(spec.build()?)
}

/// The variables that were chosen, and those that a process expects without being told.
fn environment(settings: &Settings, home: &str) -> Vec<String> {
    let mut variables = settings.environment.clone();
    let mut default = |entry: String| {
        let name = entry.split_inclusive('=').next().unwrap_or_default().to_owned();
        if !variables.iter().any(|variable| variable.starts_with(&name)) {
            variables.push(entry);
        }
    };
    default(PATH.to_owned());
    default(format!("HOME={home}"));
    default(format!("HOSTNAME={}", settings.hostname));
    if settings.terminal {
        default(format!("TERM={}", std::env::var("TERM").unwrap_or_else(|_| "xterm".into())));
    }
    variables
}

/// What Docker gives: enough for package managers and servers, nothing that reaches the host. None is inheritable or
/// ambient: a program of another user must not gain one by being started (CVE-2022-24769).
fn capabilities() -> Result<oci_spec::runtime::LinuxCapabilities> {
    let given: Capabilities = [
        Capability::Chown,
        Capability::DacOverride,
        Capability::Fsetid,
        Capability::Fowner,
        Capability::Mknod,
        Capability::NetRaw,
        Capability::Setgid,
        Capability::Setuid,
        Capability::Setfcap,
        Capability::Setpcap,
        Capability::NetBindService,
        Capability::SysChroot,
        Capability::Kill,
        Capability::AuditWrite,
    ]
    .into_iter()
    .collect();
    let none = Capabilities::new();
    let capabilities = LinuxCapabilitiesBuilder::default()
        .bounding(given.clone())
        .effective(given.clone())
        .permitted(given)
        .inheritable(none.clone())
        .ambient(none);
    Ok(capabilities.build()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(config: &serde_json::Value) -> ImageConfiguration {
        let rootfs = serde_json::json!({"type": "layers", "diff_ids": []});
        let json = serde_json::json!({"os": "linux", "architecture": "amd64", "rootfs": rootfs, "config": config});
        serde_json::from_value(json).unwrap()
    }

    fn place() -> tempfile::TempDir {
        let place = tempfile::tempdir().unwrap();
        fs::create_dir_all(place.path().join("rootfs/etc")).unwrap();
        fs::write(place.path().join("rootfs/etc/passwd"), "web:x:33:34::/var/www:\n").unwrap();
        place
    }

    #[test]
    fn image_configuration_reaches_the_process() {
        let place = place();
        let config = serde_json::json!({"User": "web", "Env": ["A=b", "PATH=/bin"], "WorkingDir": "/srv",
            "Entrypoint": ["/init"], "Cmd": ["--flag"]});
        let settings = Settings { hostname: "box".into(), ..Settings::default() }.on(&image(&config)).unwrap();
        write(place.path(), &settings).unwrap();
        let spec = Spec::load(place.path().join("config.json")).unwrap();
        let process = spec.process().as_ref().unwrap();
        assert_eq!(process.args().as_ref().unwrap(), &["/init", "--flag"]);
        assert_eq!((process.user().uid(), process.user().gid()), (33, 34));
        assert_eq!(process.env().as_ref().unwrap(), &["A=b", "PATH=/bin", "HOME=/var/www", "HOSTNAME=box"]);
        assert_eq!(process.cwd(), Path::new("/srv"));
        assert!(process.rlimits().is_none());
        assert_eq!(fs::read_to_string(place.path().join("hostname")).unwrap(), "box\n");
        // Nothing was put into the image.
        assert_eq!(fs::read_dir(place.path().join("rootfs/etc")).unwrap().count(), 1);
    }

    #[test]
    fn what_is_chosen_replaces_what_the_image_says() {
        let place = place();
        let config = serde_json::json!({"User": "web", "Env": ["A=b", "B=c"], "WorkingDir": "/srv", "Cmd": ["x"]});
        let settings = Settings {
            environment: vec!["A=d=e".into(), "NEW=".into()],
            directory: Some("/tmp".into()),
            user: Some("0:7".into()),
            read_only: true,
            ..Settings::default()
        };
        let settings = settings.on(&image(&config)).unwrap();
        // As they are kept with a container.
        let settings: Settings = serde_json::from_str(&serde_json::to_string(&settings).unwrap()).unwrap();
        write(place.path(), &settings).unwrap();
        let spec = Spec::load(place.path().join("config.json")).unwrap();
        let process = spec.process().as_ref().unwrap();
        assert_eq!((process.user().uid(), process.user().gid()), (0, 7));
        assert_eq!(process.env().as_ref().unwrap()[..3], ["B=c", "A=d=e", "NEW="]);
        assert_eq!(process.cwd(), Path::new("/tmp"));
        assert_eq!(spec.root().as_ref().unwrap().readonly(), Some(true));
    }

    #[test]
    fn command_replaces_entry_point_and_arguments() {
        let image = image(&serde_json::json!({"Entrypoint": ["/init"], "Cmd": ["x"]}));
        let given = Settings { command: vec!["/bin/true".into()], ..Settings::default() };
        assert_eq!(given.on(&image).unwrap().command, ["/bin/true"]);
        Settings::default().on(&self::image(&serde_json::json!({}))).unwrap_err();
    }

    #[test]
    fn network_none_gets_a_namespace_and_host_does_not() {
        for (network, own) in [(Network::Host, false), (Network::None, true)] {
            let place = place();
            let settings = Settings { network, command: vec!["x".into()], ..Settings::default() };
            write(place.path(), &settings).unwrap();
            let spec = Spec::load(place.path().join("config.json")).unwrap();
            let namespaces = spec.linux().as_ref().unwrap().namespaces().clone().unwrap();
            assert_eq!(namespaces.iter().any(|one| one.typ() == LinuxNamespaceType::Network), own);
            assert!(namespaces.iter().any(|one| one.typ() == LinuxNamespaceType::Pid));
        }
    }
}
