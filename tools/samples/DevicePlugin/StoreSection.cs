using Vmm.Core.Memory;
using Vmm.Core.SaveVm;
using Vmm.Core.Wire;

namespace Vmm.Samples.DevicePlugin;

/// <summary>
/// The store's pages as an iterable section: START tells their number, PART sections carry changed pages while the guest runs, END the rest. Each
/// attempt has an object of its own, so that nothing has to be reset between two.
/// <code>
/// START: be32 pages
/// PART, END: { be32 page, 4096 bytes } ... be32 0xffffffff
/// </code>
/// </summary>
internal sealed class StoreSection(StoreDevice device) : ISavePrepare, ILoadSetup
{
    private const uint EndOfRecords = uint.MaxValue;

    public SaveRoles SavePrepare(SaveContext context) => SaveRoles.Of(new Save(device));

    public LoadRoles LoadSetup(LoadContext context) => LoadRoles.Of(new Load(device, context.ValidateOnly));

    private sealed class Save : ISaveSetup, ISaveLive, ISaveCleanup
    {
        private readonly StoreDevice _device;
        private readonly DirtyBitmap _left = new(StoreDevice.Pages);

        internal Save(StoreDevice device)
        {
            _device = device;
            _left.SetAll();
            device.Changed = _left;
        }

        public bool IsActiveIterate => true;

        public void SaveSetup(QemuFileWriter f) => f.WriteUInt32(StoreDevice.Pages);

        public PendingBytes EstimatePending() => new(_left.Count() * StoreDevice.PageBytes);

        public PendingBytes ExactPending() => EstimatePending();

        public SaveProgress SaveLiveIterate(QemuFileWriter f, IterateBudget budget) => Write(f, budget);

        public void SaveLiveCompletePrecopy(QemuFileWriter f) => Write(f, IterateBudget.Unlimited);

        public void SaveCleanup() => _device.Changed = null;

        private SaveProgress Write(QemuFileWriter f, IterateBudget budget)
        {
            long page = _left.FindNext(0);
            for (; page < StoreDevice.Pages && !budget.IsExhausted(f.Position); page = _left.FindNext(page + 1))
            {
                // First the mark, then the content: the guest may write while this reads.
                _left.TestAndClear(page);
                f.WriteUInt32((uint)page);
                f.Write(_device.Memory.AsSpan((int)page * StoreDevice.PageBytes, StoreDevice.PageBytes));
            }
            f.WriteUInt32(EndOfRecords);
            return page < StoreDevice.Pages ? SaveProgress.More : SaveProgress.Done;
        }
    }

    private sealed class Load(StoreDevice device, bool validateOnly) : ILoadState
    {
        private readonly byte[] _checked = new byte[validateOnly ? StoreDevice.PageBytes : 0];
        private bool _hasBegun;

        public void LoadState(QemuFileReader f, int versionId)
        {
            if (!_hasBegun)
            {
                uint pages = f.ReadUInt32();
                if (pages != StoreDevice.Pages) throw f.Bad("store", $"{StoreDevice.Pages} pages", $"{pages}");
                _hasBegun = true;
                return;
            }
            while (true)
            {
                long at = f.Position;
                uint page = f.ReadUInt32();
                if (page == EndOfRecords) return;
                if (page >= StoreDevice.Pages) throw f.Bad("store page", $"0 to {StoreDevice.Pages - 1}", $"{page}", at);
                f.Read(validateOnly ? _checked : device.Memory.AsSpan((int)page * StoreDevice.PageBytes, StoreDevice.PageBytes));
            }
        }
    }
}
