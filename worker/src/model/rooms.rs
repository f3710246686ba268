//! Memory for activations that is lent again and again: once a step of its size was computed, the next asks the system for none.
//!
//! Fresh pages cost more than what is computed in them is worth: the system clears each when it is first touched.

use std::ops::{Deref, DerefMut};
use std::sync::{Mutex, PoisonError};

/// What is there to lend: as much as was ever lent at the same time.
#[derive(Debug, Default)]
pub struct Rooms {
    free: Mutex<Vec<Vec<f32>>>,
}

/// Numbers that go back when they are dropped.
#[derive(Debug)]
pub struct Room<'a> {
    rooms: &'a Rooms,
    numbers: Vec<f32>,
    len: usize,
}

impl Rooms {
    /// Lends so many numbers; what they are is of no account.
    #[must_use]
    pub fn lend(&self, len: usize) -> Room<'_> {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        // The smallest that is large enough, or else the largest, which grows.
        let fits = (0..free.len()).filter(|room| free[*room].len() >= len).min_by_key(|room| free[*room].len());
        let room = fits.or_else(|| (0..free.len()).max_by_key(|room| free[*room].len()));
        let mut numbers = room.map(|room| free.swap_remove(room)).unwrap_or_default();
        drop(free);
        if numbers.len() < len {
            // Nothing of the old is copied.
            numbers = Vec::new();
            numbers.resize(len, 0.0);
        }
        Room { rooms: self, numbers, len }
    }
}

impl Deref for Room<'_> {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.numbers[..self.len]
    }
}

impl DerefMut for Room<'_> {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.numbers[..self.len]
    }
}

impl Drop for Room<'_> {
    fn drop(&mut self) {
        let numbers = std::mem::take(&mut self.numbers);
        self.rooms.free.lock().unwrap_or_else(PoisonError::into_inner).push(numbers);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_came_back_is_lent_again_by_size() {
        let rooms = Rooms::default();
        let (large, small) = (rooms.lend(100), rooms.lend(10));
        let places = [large.as_ptr(), small.as_ptr()];
        drop((large, small));
        let (first, second) = (rooms.lend(10), rooms.lend(7));
        assert_eq!([second.as_ptr(), first.as_ptr()], places);
        assert_eq!((first.len(), second.len()), (10, 7));
        drop((first, second));
        assert_eq!(rooms.lend(1000).len(), 1000);
        assert_eq!(rooms.free.lock().expect("nobody panicked").len(), 2, "one grew");
    }
}
