mod sys;
mod vm;
fn main() {}
