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

use super::user;

const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What a container sees of the network.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Network {
    /// The host's.
    #[default]
    Host,
    /// A loopback of its own, which is down.
    None,
}

/// What the user chose about a container.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// The command; empty for the image's own.
    pub command: Vec<String>,
    /// The name that the container has for itself.
    pub hostname: String,
    /// Its network.
    pub network: Network,
    /// Whether it gets a terminal of its own.
    pub terminal: bool,
    /// Variables beside the image's, which they replace: `NAME=VALUE`.
    pub environment: Vec<String>,
    /// Its working directory, when not the image's.
    pub directory: Option<String>,
    /// Its user, when not the image's.
    pub user: Option<String>,
    /// Whether its root is mounted read-only.
    pub read_only: bool,
    /// What it sees beside its root.
    pub mounts: Vec<Mount>,
}

/// Writes the bundle of a container into `directory`, whose `rootfs` is mounted already. Answers the command.
///
/// # Errors
///
/// The image's configuration does not fit its content, there is no command, or the host refuses.
pub fn write(directory: &Path, image: &ImageConfiguration, settings: &Settings) -> Result<Vec<String>> {
    let root = fs::File::open(directory.join("rootfs"))?;
    let arguments = command(image, &settings.command)?;
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
    let spec = spec(image, settings, &arguments, mounts, &OwnedFd::from(root))?;
    let path = directory.join("config.json");
    let mut file = fs::File::create(&path).with_context(|| path.display().to_string())?;
    file.write_all(&serde_json::to_vec_pretty(&spec)?)?;
    Ok(arguments)
}

/// A command that was given replaces the image's entry point and its arguments.
fn command(image: &ImageConfiguration, given: &[String]) -> Result<Vec<String>> {
    let arguments = if given.is_empty() {
        let config = image.config().as_ref();
        let entrypoint = config.and_then(|config| config.entrypoint().clone()).unwrap_or_default();
        [entrypoint, config.and_then(|config| config.cmd().clone()).unwrap_or_default()].concat()
    } else {
        given.to_vec()
    };
    ensure!(!arguments.is_empty(), "the image names no command; give one: plywood run IMAGE -- COMMAND");
    Ok(arguments)
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

fn spec(
    image: &ImageConfiguration,
    settings: &Settings,
    arguments: &[String],
    mounts: Vec<Mount>,
    root: &OwnedFd,
) -> Result<Spec> {
    let config = image.config().clone().unwrap_or_default();
    let user = settings.user.as_deref().or(config.user().as_deref()).unwrap_or("");
    let user = user::find(root, user)?;
    let home = user.home.clone();
    let user = UserBuilder::default().uid(user.uid).gid(user.gid).additional_gids(user.groups).build()?;
    let directory = settings.directory.clone().or(config.working_dir().clone());
    let directory = directory.filter(|directory| directory.starts_with('/'));
    let process = ProcessBuilder::default()
        .terminal(settings.terminal)
        .user(user)
        .args(arguments.to_vec())
        .env(environment(config.env().clone().unwrap_or_default(), settings, &home))
        .cwd(PathBuf::from(directory.unwrap_or_else(|| "/".into())))
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

/// The image's variables, and those that a process expects without being told.
fn environment(mut variables: Vec<String>, settings: &Settings, home: &str) -> Vec<String> {
    for entry in &settings.environment {
        let name = entry.split_inclusive('=').next().unwrap_or_default();
        variables.retain(|variable| !variable.starts_with(name));
        variables.push(entry.clone());
    }
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
        let settings = Settings { hostname: "box".into(), ..Settings::default() };
        assert_eq!(write(place.path(), &image(&config), &settings).unwrap(), ["/init", "--flag"]);
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
        write(place.path(), &image(&config), &settings).unwrap();
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
        assert_eq!(command(&image, &["/bin/true".into()]).unwrap(), ["/bin/true"]);
        assert!(command(&self::image(&serde_json::json!({})), &[]).is_err());
    }

    #[test]
    fn network_none_gets_a_namespace_and_host_does_not() {
        for (network, own) in [(Network::Host, false), (Network::None, true)] {
            let place = place();
            let settings = Settings { network, command: vec!["x".into()], ..Settings::default() };
            write(place.path(), &image(&serde_json::json!({})), &settings).unwrap();
            let spec = Spec::load(place.path().join("config.json")).unwrap();
            let namespaces = spec.linux().as_ref().unwrap().namespaces().clone().unwrap();
            assert_eq!(namespaces.iter().any(|one| one.typ() == LinuxNamespaceType::Network), own);
            assert!(namespaces.iter().any(|one| one.typ() == LinuxNamespaceType::Pid));
        }
    }
}
