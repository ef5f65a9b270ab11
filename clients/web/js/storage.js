// Your adapter in this browser's IndexedDB, one for each base; messages are never stored.

const DATABASE = "fedlora", STORE = "adapters";

export async function keepAdapter(base, bytes) {
  return request("readwrite", (store) => store.put(bytes, base));
}

/** The bytes that were kept, undefined without any. */
export async function keptAdapter(base) {
  return request("readonly", (store) => store.get(base));
}

export async function forgetAdapter(base) {
  return request("readwrite", (store) => store.delete(base));
}

async function request(mode, act) {
  const database = await new Promise((resolve, reject) => {
    const opening = indexedDB.open(DATABASE, 1);
    opening.onupgradeneeded = () => opening.result.createObjectStore(STORE);
    opening.onsuccess = () => resolve(opening.result);
    opening.onerror = () => reject(opening.error);
  });
  try {
    return await new Promise((resolve, reject) => {
      const transaction = database.transaction(STORE, mode);
      const asked = act(transaction.objectStore(STORE));
      transaction.oncomplete = () => resolve(asked.result);
      transaction.onerror = () => reject(transaction.error);
      transaction.onabort = () => reject(transaction.error);
    });
  } finally {
    database.close();
  }
}
