mod vm;
fn main() {}
