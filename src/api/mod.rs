//! What leaves the process for other programs.

pub mod check_dto;
pub mod dto;
