using Vmm.Core.Wire;

namespace Vmm.Migration.Viewer;

/// <summary>
/// Reads the records of a VFIO device's iterable sections (vfio-migration 4.1): be64 tags, DATA with be64 length and bytes, an end tag. The viewer
/// reads the device's FULL section by VMDESC.
/// </summary>
internal sealed class VfioSectionReader(QemuFileReader f)
{
    private const ulong EndOfState = 0xffffffffef100001, SetupState = 0xffffffffef100003, DataState = 0xffffffffef100004, InitDataSent = 0xffffffffef100005;

    private int _budget = WireLimits.ViewerFields;

    /// <summary>True if records over the limit were left out.</summary>
    internal bool IsShortened => _budget < 0;

    /// <summary>True if a section belongs to a VFIO device (QEMU: <c>PATH/vfio</c>).</summary>
    internal static bool Knows(string idStr) => idStr.EndsWith("/vfio", StringComparison.Ordinal);

    /// <summary>Reads records up to the end of the section; keeps a preview of their data.</summary>
    /// <exception cref="Core.Errors.StreamFormatException">A tag is unknown, so nothing after it can be read.</exception>
    internal IReadOnlyList<StreamField> Read()
    {
        var records = new List<StreamField>();
        while (true)
        {
            long at = f.Position;
            ulong tag = f.ReadUInt64();
            switch (tag)
            {
                case EndOfState: Add("END_OF_STATE"); return records;
                case InitDataSent: Add("INIT_DATA_SENT"); return records;
                case SetupState: Add("SETUP_STATE"); break;
                case DataState: ReadData(at); break;
                default: throw f.Bad("tag of VFIO state", "END_OF_STATE, SETUP, DATA or INIT_DATA_SENT", $"0x{tag:x16}", at);
            }

            void Add(string name)
            {
                if (--_budget >= 0) records.Add(new StreamField(name, "tag", at, 8, null, []));
            }
        }

        void ReadData(long at)
        {
            ulong length = f.ReadUInt64();
            if (length > long.MaxValue) throw f.Bad("length of VFIO data", "under 2^63", length.ToString(), at);
            Span<byte> head = stackalloc byte[LeafValue.PreviewBytes];
            head = head[..(int)Math.Min(length, (ulong)head.Length)];
            f.Read(head);
            f.Skip((long)length - head.Length);
            string hex = Convert.ToHexStringLower(head);
            if (--_budget >= 0) records.Add(new StreamField("DATA_STATE", "buffer", at, f.Position - at, (ulong)head.Length < length ? hex + "..." : hex, []));
        }
    }
}
