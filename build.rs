//! Makes Rust of the two `.proto` files of the containerd front end, without `protoc`.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let folder = "src/containerd/api";
    println!("cargo::rerun-if-changed={folder}");
    let files = protox::compile(["snapshots.proto"], [folder])?;
    tonic_prost_build::configure().build_transport(false).btree_map(".").compile_fds(files)?;
    Ok(())
}
