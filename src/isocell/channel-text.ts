/** What a guest may say at once, in characters: a sentence for people, which goes into records, reports and terminals. */
const maxCharacters = 2000;

/**
 * Text of a guest, or of whatever a guest may have taken over, as the host keeps it: bounded, of one line, without
 * control characters (a NUL stops PostgreSQL, an escape commands a terminal) and without halves of surrogate pairs.
 */
export function guestText(bytes: Buffer | string): string {
  return bytes
    .toString()
    .replace(/\p{Cc}+/gu, " ")
    .trim()
    .slice(0, maxCharacters)
    .toWellFormed();
}
