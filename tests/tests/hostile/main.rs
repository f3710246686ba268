//! Hostile checkpoints, served: by the real supervisor to the real worker behind all of its walls.
//!
//! A service has one model. Its folder is exchanged under it for one hostile folder after the other; each has to come to a
//! cause that names what is wrong, at the first try, within bounded memory, while the supervisor answers, a service beside
//! it is not disturbed, and the same service goes on with a good model afterwards.

mod config;
mod damage;
mod files;
mod mutations;
mod requests;
mod stage;
mod text;
mod weights;
