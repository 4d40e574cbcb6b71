// What the tested modules use of ComfyUI's front end (scripts/app.js).

export const app = {
  extensions: [],
  registerExtension(extension) {
    this.extensions.push(extension);
  },
  ui: { settings: new EventTarget() },
};

export const api = { apiURL: (url) => url, fetchApi: async () => { throw new Error("no server"); }, addEventListener() {} };
