//! Writes `protocol/src/generated/` from `protocol/proto/`. Run by
//! `make protocol` after a change of a .proto file.

use std::path::Path;

const FILES: [&str; 3] = ["agent", "network", "storage"];

fn main() -> std::io::Result<()> {
    let protocol = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    ttrpc_codegen::Codegen::new()
        .out_dir(protocol.join("src/generated"))
        .inputs(FILES.map(|name| protocol.join(format!("proto/{name}.proto"))))
        .include(protocol.join("proto"))
        .rust_protobuf()
        .customize(ttrpc_codegen::Customize {
            async_server: true,
            ..Default::default()
        })
        .rust_protobuf_customize(ttrpc_codegen::ProtobufCustomize::default())
        .run()
}
